"""The GPU side: a supervisor without torch, and the child processes that import it."""
