"""Cache of an endpoint's answers, shared by all runs."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handrail._util.errors import UserError

LOCK_LIMIT = 10.0


class AnswerCache:
    """Map from question to answer in one SQLite file, for many threads and processes; a cut-off answer is
    None.

    If the file turns out to be damaged, or stays locked too long, the cache disables itself and calls
    ``on_break`` once. Raises UserError if the file cannot be created.
    """

    def __init__(self, path: Path, on_break: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._on_break = on_break
        self._database: sqlite3.Connection | None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, LOCK_LIMIT, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"endpoint.cache {str(path)!r} cannot be opened: {error}") from error
        self._execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, answer TEXT)")

    def get(self, question: bytes) -> tuple[str | None] | None:
        return next(iter(self._execute("SELECT answer FROM answers WHERE question = ?", question)), None)

    def put(self, question: bytes, answer: str | None) -> None:
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", question, answer)

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            if self._database is None:
                return []
            try:
                return self._database.execute(statement, values).fetchall()
            except sqlite3.Error:
                self._database.close()
                self._database = None
        self._on_break()
        return []
