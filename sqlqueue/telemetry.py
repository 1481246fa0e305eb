"""How programs of ours log: lines on stderr, as text, or as JSON for machines.

What was chosen is in the environment, so that child processes log as their parent does:
SQLQUEUE_LOG_LEVEL (INFO) and SQLQUEUE_LOG_FORMAT (text or json).
"""

import json
import logging
import os
from datetime import UTC, datetime

TEXT = "%(asctime)s %(levelname)s %(message)s"


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging() -> None:
    """Send the log of this process to stderr, unless it goes somewhere already."""
    logging.basicConfig(level=os.environ.get("SQLQUEUE_LOG_LEVEL", "INFO").upper(), format=TEXT)
    if os.environ.get("SQLQUEUE_LOG_FORMAT") == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
