"""HTTP below the routes: connections, bodies, ranges, idempotency keys."""
