"""What strop is called, what it needs, and where its packages lie.

The folders stay at the top of the repository while the import names are strop.engine, strop.kernels and strop.bench: a
top-level `kernels` in site-packages would collide with Hugging Face's package of that name, which transformers and
diffusers probe for. A wheel holds source files and the recipes; weights are no package data.
The version has its one home here; code that wants it asks importlib.metadata.version("strop").
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("engine", "kernels", "bench")

setup(
    name="strop",
    version="0.1.0",
    description="Post-trains Stable Diffusion 1.5 and SDXL with step-by-step preference optimization (SPO) on one node",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=["diffusion", "stable diffusion", "SDXL", "preference optimization", "DPO", "SPO", "LoRA", "RLHF"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    package_dir={f"strop.{folder}": folder for folder in (*FOLDERS, "configs")},
    packages=[
        *(f"strop.{name}" for name in find_packages(include=[*FOLDERS, *(f"{folder}.*" for folder in FOLDERS)])),
        "strop.configs",
    ],
    package_data={
        "strop.configs": ["*.yaml"],
        "strop.engine": ["py.typed", "study/page.*", "evaluation/gallery.*"],
        "strop.kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["strop = strop.engine.cli:main"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "torch>=2.10",
        "triton>=3.4; sys_platform == 'linux'",  # CUDA builds of torch bring it, CPU builds do not
        "tqdm>=4.66",
        "diffusers>=0.36",
        "transformers>=5,<6",
        "peft>=0.18",
        "deepspeed>=0.18",
        "pydantic>=2,<3",
        "safetensors>=0.5",
        "pyyaml>=6",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "pyarrow>=18",
        "ftfy>=6.1",  # prompts as open_clip reads them, which HPS needs
        "psutil>=5.9",
        "nvidia-ml-py>=12.535",  # NVML; imports without a driver
        "matplotlib>=3.8",
        "tensorboard>=2.15",
    ],
    extras_require={
        "cuda": ["xformers>=0.0.35; sys_platform == 'linux'"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "krippendorff>=0.8",
            "ruff>=0.12",
            "setuptools>=77",
        ],
        "wandb": ["wandb>=0.31"],
        "bench": ["pytest>=8", "pytest-benchmark>=5"],
    },
)
