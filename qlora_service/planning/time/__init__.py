"""How long a job takes, from earlier jobs or a timed step."""
