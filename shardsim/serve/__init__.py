"""A local page to play with plans: what it asks (`asked`), the answers (`desk`), the server."""
