"""What `serve` and `chat` are made of: the supervised engine, the HTTP interface, the sources of an answer, feedback and the page."""
