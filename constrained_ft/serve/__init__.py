"""A web page to explore a run: type a prompt, see three models answer, and what R makes of it."""
