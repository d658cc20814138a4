"""`strop evaluate SYSTEM ... --out DIR`: base, LoRAs and models on the same prompts from the same noise.

`deepspeed --num_gpus 4 engine/evaluate_lora.py SYSTEM ... --out DIR` does it on several GPUs. Nothing is trained.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
from collections.abc import Sequence

from .errors import exit_on_user_error
from .evaluation.arguments import DTYPES, Request
from .evaluation.protocols import NAMES as PROTOCOLS
from .scorers.names import NAMES as SCORERS
from .user_files import user_path


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Draws the same prompts from the same noise with every system, scores the images, compares all with the base."""
    parser = argparse.ArgumentParser(prog="strop evaluate", description=main.__doc__)
    add = parser.add_argument
    add("systems", metavar="SYSTEM", nargs="+", help="run, LoRA (diffusers or kohya) or model folder; or NAME=PATH")
    add("--out", required=True, type=user_path, help="folder of images, scores, tables and gallery; the same goes on")
    add("--base", help="model that LoRAs are added to, and compared with (default: that of the first LoRA)")
    add("--components", help="as model.components, for a base that is one .safetensors file")
    add("--prompts", help="file of prompts (default: the held-out prompts of the run that trained the first LoRA)")
    add("--scorers", help=f"of {', '.join(SCORERS)}, or module:factory; with commas (default: the run's own, or all)")
    add("--protocol", default="paper", help=f"{', '.join(PROTOCOLS)} (default: %(default)s): how images are drawn")
    add("--seeds", type=int, help="images of each prompt (default: the protocol's)")
    add("--strength", help="factors of each LoRA, such as 0.5,1.0 (default: 1)")
    add("--dtype", default="float32", help=f"{', '.join(DTYPES)}: type of the model's weights (default: %(default)s)")
    add("--batch", type=int, default=16, help="images at a time; fewer take less memory (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--published", action="store_true", help="set the paper's rows beside, which are not measured here")
    add("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    request = Request.of(parser.parse_args(argv))
    from .evaluation import run  # torch and diffusers take seconds: what is wrong with a word has been said by now

    run.run(request)


if __name__ == "__main__":
    main()
