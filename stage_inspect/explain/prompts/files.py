"""Read a prompt: what is said to the model as its task, what it is given, and the hash of the file."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from string import Template

ROLES = ("[system]\n", "[user]\n")


@dataclass(frozen=True)
class Prompt:
    """A file with two parts, in which ``$name`` stands for what is filled in."""

    name: str
    system: Template
    user: Template
    sha256: str

    @classmethod
    def read(cls, name: str) -> "Prompt":
        """One of this folder."""
        text = (files("stage_inspect.explain.prompts") / f"{name}.txt").read_text(encoding="utf-8")
        _, _, rest = text.partition(ROLES[0])
        system, _, user = rest.partition(ROLES[1])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(name, Template(system.strip()), Template(user.strip()), digest)

    def filled(self, **values: object) -> tuple[str, str]:
        """(system, user); every name of the file must be given."""
        return self.system.substitute(values), self.user.substitute(values)

    @property
    def record(self) -> dict[str, str]:
        """What is written beside everything that was made with it."""
        return {"prompt": self.name, "prompt_sha256": self.sha256}
