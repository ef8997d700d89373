"""One batch of prompts to pixels on one device. Nothing here writes results to disk or knows the command line."""
