"""The page of the protocol's calls, messages and enums, with the comments of the ``.proto``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from google.protobuf import descriptor_pb2 as descriptors

PROTO = "touchline/v1/replay.proto"
Field = descriptors.FieldDescriptorProto
File = descriptors.FileDescriptorProto
Message = descriptors.DescriptorProto
Enum = descriptors.EnumDescriptorProto
Comments = dict[tuple[int, ...], str]
"""The comment of each element, by its path: numbers of fields of the descriptors and positions in them, in turn."""


def read(protos: Path) -> File:
    """Returns the ``.proto`` as protoc reads it, comments included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}", "--include_source_info", f"--descriptor_set_out={out}", PROTO]
        subprocess.run(command, check=True)
        return descriptors.FileDescriptorSet.FromString(out.read_bytes()).file[0]


def render(protos: Path) -> str:
    """Returns the page as Markdown."""
    file = read(protos)
    comments = {tuple(place.path): place.leading_comments or place.trailing_comments for place in file.source_code_info.location}
    lines = [
        "# Messages",
        "",
        f"Every call, message and field of `protos/{PROTO}`, generated from it. [The protocol](../wire.md) says how they go together.",
    ]
    lines += ["", *prose(comments[(File.SYNTAX_FIELD_NUMBER,)])]
    for number, service in enumerate(file.service):
        path = (File.SERVICE_FIELD_NUMBER, number)
        lines += [f"## Service {service.name}", "", *prose(comments[path])]
        for place, method in enumerate(service.method):
            lines += [f"### {method.name}", "", call(method), "", *prose(comments[*path, 2, place])]
    lines += ["## All messages", ""]
    for number, message in enumerate(file.message_type):
        lines += of_message(message, (File.MESSAGE_TYPE_FIELD_NUMBER, number), comments, prefix="")
    lines += ["## Enums", ""]
    for number, enum in enumerate(file.enum_type):
        lines += of_enum(enum, (File.ENUM_TYPE_FIELD_NUMBER, number), comments, prefix="")
    return "\n".join(lines) + "\n"


def prose(comment: str) -> Iterator[str]:
    """Yields a comment's lines; what is laid out by indentation becomes a block of text, and a list gets its blank line."""
    before = ""
    for indented, group in groupby(
        (line.removeprefix(" ").rstrip() for line in comment.splitlines()), key=lambda line: line.startswith("  ")
    ):
        lines = list(group)
        if indented:
            yield from ("", "```text", *(line[2:] for line in lines), "```", "")
            continue
        for line in lines:
            if line.startswith("- ") and not before.startswith("- "):
                yield ""
            yield line
            before = line
    yield ""


def call(method: descriptors.MethodDescriptorProto) -> str:
    def side(type_name: str, streaming: bool) -> str:
        return ("stream of " if streaming else "") + linked(type_name)

    return f"{side(method.input_type, method.client_streaming)} → {side(method.output_type, method.server_streaming)}"


def linked(type_name: str) -> str:
    name = type_name.removeprefix(".touchline.v1.")
    return f"[{name}](#{name.replace('.', '').lower()})"


def type_of(field: Field) -> str:
    scalar = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = linked(field.type_name) if field.type_name else f"`{scalar}`"
    label = "repeated " if field.label == Field.LABEL_REPEATED else "optional " if field.proto3_optional else ""
    return label + name


def cell(comment: str) -> str:
    return " ".join(comment.split()).replace("|", "\\|")


def of_message(message: Message, path: tuple[int, ...], comments: Comments, *, prefix: str) -> Iterator[str]:
    """Yields a section for a message, and one for each that is nested in it."""
    name = prefix + message.name
    yield from (f"### {name}", "", *prose(comments.get(path, "")))
    if message.field:
        yield from ("| Field | Number | Type | |", "|---|---|---|---|")
    for place, field in enumerate(message.field):
        one_of = field.HasField("oneof_index") and not field.proto3_optional
        meaning = f"One of `{message.oneof_decl[field.oneof_index].name}`. " if one_of else ""
        meaning += cell(comments.get((*path, Message.FIELD_FIELD_NUMBER, place), ""))
        yield f"| `{field.name}` | {field.number} | {type_of(field)} | {meaning} |"
    yield ""
    for place, nested in enumerate(message.nested_type):
        yield from of_message(nested, (*path, Message.NESTED_TYPE_FIELD_NUMBER, place), comments, prefix=f"{name}.")
    for place, enum in enumerate(message.enum_type):
        yield from of_enum(enum, (*path, Message.ENUM_TYPE_FIELD_NUMBER, place), comments, prefix=f"{name}.")


def of_enum(enum: Enum, path: tuple[int, ...], comments: Comments, *, prefix: str) -> Iterator[str]:
    """Yields a section for an enum."""
    yield from (f"### {prefix}{enum.name}", "", *prose(comments.get(path, "")), "| Value | Number | |", "|---|---|---|")
    for place, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {cell(comments.get((*path, Enum.VALUE_FIELD_NUMBER, place), ''))} |"
    yield ""
