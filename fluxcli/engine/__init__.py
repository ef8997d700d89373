"""One batch of prompts to pixels on one device. Nothing here writes results to disk or knows the command line."""

import os

# torch reads it when it first takes memory of a GPU. In blocks of fixed size, its default, a stage finds no use for
# what one of other sizes left: the graphs held 5.0 GB where 3.2 were planned. What the user set is kept.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
