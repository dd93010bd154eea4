"""Duration of a job, estimated from earlier jobs or a timed step."""
