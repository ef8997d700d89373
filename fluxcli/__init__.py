"""fluxcli: prompts in, FLUX.1 images and timing manifests out. Importing this package imports nothing else."""

__version__ = "0.1.0"
