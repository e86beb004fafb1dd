"""What a server says while it runs: one line an event on stderr, for people or as JSON for programs."""

import datetime
import json
import logging
import re
from typing import Any

# The form of an API key. No message of ours holds one; should one slip into another library's, it ends here.
_KEY = re.compile(r"sv_[0-9a-f]{12}_[A-Za-z0-9_-]{43}")


def tell(log: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Logs an event, such as ``session_opened``, with fields that JSON can hold."""
    if log.isEnabledFor(level):
        log.log(level, "%s", event.replace("_", " "), extra={"event": event, "fields": fields})


def configure(*, as_json: bool) -> None:
    """Sends the log to stderr: ours from INFO on, that of other libraries from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if as_json else Text())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("splitveil").setLevel(logging.INFO)
    logging.captureWarnings(True)


class Json(logging.Formatter):
    """One object a line: time (UTC), level, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        event = getattr(record, "event", None)
        line = {"time": _time(record), "level": record.levelname.lower(), "event": event or "message"}
        if event is None or not hasattr(record, "fields"):
            line |= {"logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _clean(json.dumps(line, ensure_ascii=False, default=str))


class Text(logging.Formatter):
    """Time (UTC), level, the event in words, its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; several for an unexpected error's traceback."""
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        line = f"{_time(record)} {record.levelname.lower()} {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return _clean(line)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _clean(line: str) -> str:
    return _KEY.sub("sv_…", line)
