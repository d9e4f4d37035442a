"""What became of a stage's modules: fused, compiled, or as transformers wrote them, and why.

Plain values. Filled by injection.py and compiled.py, read by worker/certify.py and the loader.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_serve.model.certificate import COMPILED, FUSED


@dataclass
class InjectionReport:
    """What inject() did, and then compile_layers(). Modules are decoder layers, the final norm, and the head
    with its tied embedding.

    reasons counts the kept modules by reason; max_error is the largest relative error of the others. choices
    says of each module by name ("layer 3", "norm", "head") that it is FUSED or COMPILED, or why it is kept.
    """

    injected: int = 0
    compiled: int = 0
    kept: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    max_error: float = 0.0
    choices: dict[str, str] = field(default_factory=dict)

    def fuse(self, name: str, error: float) -> None:
        self.injected += 1
        self.max_error = max(self.max_error, error)
        self.choices[name] = FUSED

    def keep(self, reason: str, *names: str) -> None:
        self.kept += len(names)
        self.reasons[reason] = self.reasons.get(reason, 0) + len(names)
        self.choices |= dict.fromkeys(names, reason)

    def compile(self, name: str, error: float) -> None:
        self._forget(name)
        self.compiled += 1
        self.max_error = max(self.max_error, error)
        self.choices[name] = COMPILED

    def explain(self, name: str, reason: str) -> None:
        """Another reason why a module that is not fused is kept."""
        self._forget(name)
        self.keep(reason, name)

    def _forget(self, name: str) -> None:
        reason = self.choices.pop(name, None)
        if reason == COMPILED:
            self.compiled -= 1
        elif reason is not None:
            self.kept -= 1
            self.reasons[reason] -= 1
            if not self.reasons[reason]:
                del self.reasons[reason]
