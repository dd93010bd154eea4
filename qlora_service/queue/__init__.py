"""Claims on jobs under a fencing token, and which job is next."""
