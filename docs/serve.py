"""Serve build/book to this machine alone: `python docs/serve.py [port]`."""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BOOK = Path(__file__).resolve().parents[1] / "build" / "book"


def main(port: int) -> None:
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(SimpleHTTPRequestHandler, directory=str(BOOK)))
    except OSError as error:
        sys.exit(f"mvrepro: port {port} can't be used ({error.strerror}): say make serve PORT=another")
    print(f"the book is at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main(int(sys.argv[1]))
