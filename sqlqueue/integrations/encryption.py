"""Arguments and results that the database cannot read, with the library `cryptography`.

Who can read the tables, a dump or a backup sees which tasks ran and when, not what with. The rest
of a job stays readable: its task, queue, tags, description, headers, and the messages of errors.
"""

import json
from collections.abc import Sequence

from cryptography.fernet import Fernet, MultiFernet

SEALED = "$sealed"


class Encryption:
    """A cipher for `queue.cipher`: Fernet, that is AES-128 in CBC mode with an HMAC.

    keys  as `Fernet.generate_key()` makes them: the first one seals, all of them open. To change a
          key, put the new one first, on all machines that run or enqueue jobs; drop the old one
          after the retention. What was stored before there was a cipher opens as it is.

    Opening raises `cryptography.fernet.InvalidToken` if no key fits; a run then fails.
    Source: https://github.com/fernet/spec/blob/master/Spec.md
    """

    def __init__(self, keys: Sequence[str | bytes]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])

    def seal(self, text: str) -> str:
        """Return an object with the sealed text."""
        return json.dumps({SEALED: self._fernet.encrypt(text.encode()).decode()})

    def open(self, text: str) -> str:
        """Return what was sealed; other text as it is."""
        found = json.loads(text)
        if not isinstance(found, dict) or list(found) != [SEALED]:
            return text
        return self._fernet.decrypt(found[SEALED]).decode()
