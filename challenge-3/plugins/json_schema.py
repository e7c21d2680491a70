"""JSON Schema validation (draft 2020-12), where the schema comes with the request.

`pattern` is refused, since a stranger's regular expression can take for ever; references lead
nowhere but into the schema itself.
"""

from itertools import islice
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import BaseModel, ConfigDict, Field
from referencing import Registry
from referencing.exceptions import Unresolvable

from utils import Finding, ValidationReport, Validator

REPORTED = 50
REFUSED = frozenset({"pattern", "patternProperties"})


class Document(BaseModel):
    """A schema, and what is to be checked against it."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, json_schema_extra={
        "examples": [{
            "schema": {
                "type": "object",
                "required": ["icao", "lat"],
                "properties": {"icao": {"type": "string", "minLength": 4},
                               "lat": {"type": "number", "minimum": -90, "maximum": 90}},
            },
            "data": {"icao": "EDDF", "lat": 50.03},
        }],
    })  # fmt: skip

    rules: dict[str, Any] = Field(alias="schema", description="The JSON Schema.")
    data: Any


class ValidateJSONSchema(Validator[Document]):
    """Checks data against the JSON Schema that comes with it."""

    version = "1.0.0"
    description = "Checks data against the JSON Schema that comes with it."
    author = "challenge-3"

    def validate(self, data: Document) -> ValidationReport:
        """All places that do not fit; a schema that is none is reported under /schema."""
        if (refused := _refused(data.rules)) is not None:
            return ValidationReport.of([("/schema", f"'{refused}' is not accepted here.")])
        try:
            Draft202012Validator.check_schema(data.rules)
        except SchemaError as wrong:
            return ValidationReport.of([_finding("/schema", wrong)])
        checker = Draft202012Validator(data.rules, registry=Registry())
        try:
            errors = islice(checker.iter_errors(data.data), REPORTED)
            found = [_finding("/data", error) for error in errors]
        except Unresolvable:
            return ValidationReport.of([("/schema", "It refers to what is not in it.")])
        except RecursionError:
            return ValidationReport.of([("/schema", "Its references go round in circles.")])
        return ValidationReport(tuple(sorted(found, key=lambda finding: finding.pointer)))


def _refused(schema: Any) -> str | None:
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if found := REFUSED.intersection(each):
                return min(found)
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
    return None


def _finding(root: str, error: Any) -> Finding:
    """Where, and by which keyword; what was sent is not repeated."""
    parts = (str(p).replace("~", "~0").replace("/", "~1") for p in error.absolute_path)
    limit = f" {error.validator_value!r:.80}" if not isinstance(error.validator_value, dict) else ""
    return Finding(root + "".join(f"/{part}" for part in parts), f"{error.validator}{limit}")
