"""AWS's judgement of a request, offline: botocore's own validator, and a JSON Schema made of its shapes, which knows more.

botocore's validator finds unknown and missing keys, wrong types and too small values; enumerations, patterns and upper limits
are in the same service description but unused. The schema checks all of them.
"""

from __future__ import annotations

from typing import Any

_TYPES = {
    "string": "string",
    "integer": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "boolean": "boolean",
}


def problems(service: str, operation: str, request: dict[str, Any]) -> list[str]:
    """What both find wrong with a request; none for a good one."""
    import botocore.session
    import jsonschema
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model(service).operation_model(operation)
    told = ParamValidator().validate(request, model.input_shape)
    validator = jsonschema.Draft202012Validator(schema(model.input_shape))
    found = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(request)]
    return ([told.generate_report()] if told.has_errors() else []) + found


def schema(shape: Any, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON Schema of a shape. A shape within itself is left open."""
    if shape.name in within:
        return {}
    inner = (*within, shape.name)
    limits = shape.metadata
    if shape.type_name == "structure":
        made = {
            "type": "object",
            "properties": {name: schema(member, inner) for name, member in shape.members.items()},
            "required": list(shape.required_members),
            "additionalProperties": False,
        }
        return made | ({"minProperties": 1, "maxProperties": 1} if limits.get("union") else {})
    if shape.type_name == "list":
        return {"type": "array", "items": schema(shape.member, inner)} | _limits(limits, "minItems", "maxItems")
    if shape.type_name == "map":
        key, value = schema(shape.key, inner), schema(shape.value, inner)
        made = {"type": "object", "propertyNames": key, "additionalProperties": value}
        return made | _limits(limits, "minProperties", "maxProperties")
    made = {"type": _TYPES[shape.type_name]} if shape.type_name in _TYPES else {}
    if shape.type_name != "string":
        return made | _limits(limits, "minimum", "maximum")
    made |= _limits(limits, "minLength", "maxLength")
    if limits.get("enum"):
        made["enum"] = list(limits["enum"])
    if limits.get("pattern"):
        made["pattern"] = f"^(?:{limits['pattern']})$"
    return made


def _limits(limits: dict[str, Any], low: str, high: str) -> dict[str, Any]:
    return {name: limits[key] for name, key in ((low, "min"), (high, "max")) if key in limits}
