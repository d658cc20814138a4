"""Runs the iterations of every method: collects rows, learns from them, measures, logs and saves."""

from __future__ import annotations

from ..runtime.checkpoint import Training
from ..runtime.columns import GRAD_NORM, LEFT_OUT, UNSCORED
from ..runtime.diagnosis import Diagnosis
from ..runtime.optimizer import Optimizer
from ..runtime.session import Session
from .protocol import Method, Monitor


def train(session: Session, method: Method, optimizer: Optimizer, monitor: Monitor | None = None) -> None:
    """Runs a session's remaining iterations, up to its last record and checkpoint. Every rank calls it.

    monitor: evaluates the run meanwhile, and may end it.
    """
    columns = (*method.columns, LEFT_OUT, *(monitor.columns if monitor else ()))
    session.begin(Training(method.trainable, optimizer, method.rngs), columns, method.stage)
    if monitor:
        monitor.replay(session.metrics.past)
    if session.done == 0:
        measure(session, method, 0)
    diagnosis = Diagnosis(optimizer.gate, session.dir, session.ranks.first)
    for iteration in session.iterations():
        optimizer.set_lr(method.learning_rate(iteration))
        with session.clock(method.stage):
            rows, facts = method.collect(iteration)
        session.note(facts)
        session.ledger.work(facts)
        with session.clock("update"):
            for batch in method.batches(rows):
                loss, stats = method.loss(batch)
                finite = optimizer.backward(loss)
                norm = optimizer.step()
                session.note(stats, weight=len(batch) * finite)
                session.note({LEFT_OUT.name: 1.0 - finite.double()})
                if norm is not None:
                    session.note({GRAD_NORM.name: norm})
                    diagnosis.after_step(iteration + 1, facts.get(UNSCORED.name, 0))
            if iteration == 0:
                diagnosis.after_first(optimizer, session.config.iterations)
        monitored = measure(session, method, iteration + 1, monitor)
        session.save(iteration + 1, monitored, monitor.best if monitor else None)
        if monitor and monitor.stopped:
            break


def measure(session: Session, method: Method, done: int, monitor: Monitor | None = None) -> bool:
    """Measures what is due after `done` iterations, logs the record if one is due, and returns whether the monitor
    has measured, whose best measurement needs a checkpoint."""
    with session.clock("evaluate"):
        monitored = monitor.measure(done) if monitor else {}
        measured = {**method.measure(done), **monitored}
    session.note(measured)
    if measured or done > 0:
        session.log(done, now=bool(measured))
    return bool(monitored)
