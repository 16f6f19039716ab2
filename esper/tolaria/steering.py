"""Words of people about a run's adaptations: written by whoever may write to the run's folder, read by its trainer."""

from __future__ import annotations

import logging

from pydantic import ValidationError

from esper.leyline.errors import StorageError
from esper.leyline.steering import STEERING_FOLDER, PersonsWord
from esper.storage import Storage

_LOG = logging.getLogger(__name__)


class Steering:
    """The words of one run.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._heard: dict[str, PersonsWord] = {}  # by file
        self._unreadable: set[str] = set()

    def say(self, word: PersonsWord) -> None:
        """Keeps a word; it is heard at the end of the epoch.

        Raises:
            StorageError: if the folder cannot be written.
        """
        name = f"{STEERING_FOLDER}/{int(1e6 * word.timestamp):020d}-{word.word_id}.json"
        self._folder.write(name, word.model_dump_json(indent=1).encode())

    def heard(self) -> tuple[PersonsWord, ...]:
        """The newest word about each kernel of each seed. Where the storage does not answer, as it stood before."""
        try:
            for name in self._folder.names(STEERING_FOLDER):
                if name not in self._heard and name not in self._unreadable:
                    self._read(name)
        except StorageError as error:
            _LOG.warning("steering.unheard", extra={"reason": str(error)})
        newest = {(word.seed_id, word.kernel_id): word for _, word in sorted(self._heard.items())}
        return tuple(newest.values())

    def _read(self, name: str) -> None:
        try:
            self._heard[name] = PersonsWord.model_validate_json(self._folder.read(f"{STEERING_FOLDER}/{name}"))
        except ValidationError as error:
            self._unreadable.add(name)
            _LOG.warning("steering.unreadable", extra={"file": name, "reason": str(error.errors()[0]["msg"])})
