"""FLUX.1: what is known of it without torch."""
