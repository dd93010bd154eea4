"""Sizes that determine memory and disk usage, shared by the training and, without torch, the planner."""

from __future__ import annotations

HEAD_CHUNK = 256
"""Positions whose logits exist at a time"""
CPU_ROWS = 16
"""Positions whose float32 logits fit in a CPU's cache"""

MIN_PAGED_ELEMENTS = 100_000
"""State of smaller parameters never pages. Source: bitsandbytes 0.50, optim/optimizer.py, `get_state_buffer`"""
MIN_8BIT_ELEMENTS, EIGHT_BIT_BLOCK = 4096, 256
"""Smaller parameters keep 32-bit state; elements per quantization constant. Source: bitsandbytes 0.50,
optim/optimizer.py"""

KEPT_CHECKPOINTS = 2
"""Checkpoints on disk: the last one, and the one before it in case the last one is damaged"""
ROW_BYTES, STEP_BYTES = 36, 512
"""In a checkpoint: a row's entry in the row losses; an upper bound for a step's line in the metrics"""
SMALL_FILES_BYTES = 256 * 1024
"""In a checkpoint: headers, values, states of the random generators, rounding up to disk blocks"""
DATABASE_BYTES = 16 * 2**20
"""Disk space reserved for the database, which has to record that the disk is full"""
