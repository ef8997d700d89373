"""Rows in, files out: reading, planning, storing and running a job. Nothing here imports torch."""
