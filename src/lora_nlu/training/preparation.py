"""From the command line to examples, head, adapter and model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError, printable
from lora_nlu.labels import label_list, normalised_label, placeholder_labels, rows_by_label


@dataclass(frozen=True)
class Head:
    """The head that a run starts from or evaluates: whose it is, its labels (None: not recorded), its rows.

    saved_as: the class that its config names, where that has no such head: nothing is trained then, by the config.
    """

    source: str
    labels: tuple[str, ...] | None
    count: int
    saved_as: str = ""

    def named(self, names: Sequence[str], names_new_labels: bool) -> "Head":
        """The head with the names that --labels gives, where it records none.

        names_new_labels: the flag is for the labels that training on one's own files starts, which may be others than
        the head's; their order may not contradict it. Raises UserError if the flag doesn't fit the head.
        """
        if self.labels is None:
            if len(names) == self.count:
                return replace(self, labels=tuple(names))
            if names_new_labels:
                return self
            raise UserError(f"{self.source}: its head has {self.count} classes, but --labels names {len(names)}.")
        if [*map(normalised_label, names)] == [*map(normalised_label, self.labels)]:
            return self
        if names_new_labels and rows_by_label(self.labels, names) is None:
            return self
        if not self.labels:
            raise UserError(f"{self.source}: predicts a number; a regression has no label names. Leave --labels out.")
        raise UserError(
            f"{self.source}: was trained to predict {label_list(self.labels)}, but --labels names {label_list(names)}"
            ".\nLeave --labels out: the label names are recorded."
        )

    def check_ids(self, wanted: Sequence[str] | None) -> str:
        """Of a head without names only labels that are its ids can be told, without a guess; returns a line saying so.

        wanted: labels of one's own examples, class 0 first; None where the examples have none. Raises UserError.
        """
        if wanted is not None and tuple(wanted) in (tuple(map(str, range(self.count))), placeholder_labels(self.count)):
            ids = f"{self.source}: records no label names; the labels {label_list(wanted)} are used as its class ids."
            return f"{ids} If that is wrong, name its classes, class 0 first: --labels."
        orders = [f"{task.name} {','.join(task.labels)}" for task in TASKS.values() if len(task.labels) == self.count]
        known = f"; GLUE's: {'; '.join(orders)}" if orders else ""
        if self.saved_as:
            raise UserError(
                f"{self.source}: has no trained head, by its config.json (a {printable(self.saved_as)}).\n"
                "Train first (--do_train), or give an adapter of it with --lora_path.\n"
                f"If it has one, name its classes, class 0 first, with --labels{known}."
            )
        raise UserError(
            f"{self.source}: records no names for the {self.count} classes of its head; a guess could be "
            f"wrong.\nName them, class 0 first, with --labels{known}.\n"
            "If it has no trained head yet, train first (--do_train)."
        )
