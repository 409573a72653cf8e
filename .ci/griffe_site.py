"""What docs/api*.md need to know of the code beyond what stands in it: roles, and functions that are made by others."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe


class Site(griffe.Extension):
    """Roles such as :func:`tome.merged` become plain code; what ``_patch`` makes are functions with its arguments."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":(?:func|mod|class|data|meth):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            if isinstance(obj, griffe.Function) and obj.returns is not None:  # else a colon in the text ends a type
                told = rf"\g<0>{obj.returns}: "
                obj.docstring.value = re.sub(r"Returns:\n\s+", told, obj.docstring.value)

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        if mod.path != "tome.patch":
            return
        made = next(each for each in ast.parse(mod.source).body if getattr(each, "name", "") == "_patch")
        inner = next(each for each in ast.walk(made) if isinstance(each, ast.FunctionDef) and each.name == "patch")
        required = [None] * (len(inner.args.args) - len(inner.args.defaults))
        parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    argument.arg,
                    annotation=argument.annotation and ast.unparse(argument.annotation),
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=default and ast.unparse(default).replace("by_size", "None"),
                )
                for argument, default in zip(inner.args.args, [*required, *inner.args.defaults], strict=True)
            )
        )
        described = ast.literal_eval(str(mod["ARGUMENTS"].value))
        for name, member in list(mod.members.items()):
            if not member.is_alias and member.is_attribute and str(member.value).startswith("_patch("):
                summary = ast.literal_eval(ast.parse(str(member.value), mode="eval").body.args[2])
                function = griffe.Function(
                    name, parameters=parameters, returns="nn.Module", lineno=member.lineno, parent=mod
                )
                function.docstring = griffe.Docstring(f"{summary}\n{described}", parent=function)
                self.on_instance(obj=function)
                mod.set_member(name, function)
