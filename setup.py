"""Package map: the folders stay at the top of the repository, the import names are strop.engine, strop.kernels, strop.bench."""

from setuptools import setup

setup(
    package_dir={"strop.engine": "engine", "strop.kernels": "kernels", "strop.bench": "bench"},
    packages=["strop.engine", "strop.kernels", "strop.bench", "strop.bench.tinyworld"],
)
