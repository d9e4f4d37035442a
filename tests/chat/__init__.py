"""A package, so that its server, page and browser end with its last test: playwright holds the event loop."""
