"""A part of the tests' object store that fails every third write, after it has come in."""
from __future__ import annotations

import itertools


def filter_factory(conf, **settings):
    """Paste's way to make a filter."""
    writes = itertools.count(1)

    def wrap(app):
        def answer(environ, start_response):
            if environ["REQUEST_METHOD"] in ("PUT", "POST") and next(writes) % 3 == 0:
                while environ["wsgi.input"].read(65536):
                    pass
                start_response("503 Service Unavailable", [("Content-Length", "0")])
                return [b""]
            return app(environ, start_response)

        return answer

    return wrap
