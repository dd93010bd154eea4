"""The GPU side: a supervisor without torch, and its child processes, which import torch."""
