"""Lines of JSON as another process adds them: only what is new is read, and a line half written waits for its end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Follower:
    """Follows the file at ``path``, which need not be there yet.

    ``begun``: how often it was begun anew, since a file was cut or replaced; whoever adds up lines starts afresh then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = 0
        self._inode, self._offset = 0, 0

    def new(self) -> list[dict[str, Any]]:
        """The whole lines since the last look, those that are no JSON object left out."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                    self.begun += 1
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                found.append(line)
        return found
