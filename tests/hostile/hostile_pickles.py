# ruff: noqa: E501 - tables, one row a file
"""Hostile pickles, assembled opcode by opcode. Each would create the canary file if anything unpickled it."""

from __future__ import annotations

import base64
import marshal
import pickle
import struct
import zlib
from collections.abc import Callable

Payload = Callable[[str], bytes]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def whole(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def raw(data: bytes) -> bytes:
    """Protocol 3: bytes."""
    return b"B" + struct.pack("<I", len(data)) + data


def shell(canary: str) -> str:
    return f"touch {canary}"


def code(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


def by_shell(module: str, name: str) -> Payload:
    return lambda canary: whole(called(named(module, name), text(shell(canary))))


def by_code(module: str, name: str, *more: bytes) -> Payload:
    return lambda canary: whole(called(named(module, name), text(code(canary)), *more))


class _Reduced:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (code(self.canary),)


def _os_module() -> bytes:
    return called(named("importlib", "import_module"), text("os"))


def _marshalled(canary: str) -> bytes:
    return marshal.dumps(compile(code(canary), "x", "exec"))


# Opcodes of every class that calls or names something. The flag: Python 3.11's own unpickler runs it.
OPCODES: dict[str, tuple[Payload, bool]] = {
    "reduce": (by_code("builtins", "exec"), True),
    "reduce-protocol-0": (lambda c: pickle.dumps(_Reduced(c), protocol=0), True),
    "reduce-protocol-4-framed": (lambda c: pickle.dumps(_Reduced(c), protocol=4), True),
    "reduce-protocol-5": (lambda c: pickle.dumps(_Reduced(c), protocol=5), True),
    "text-only-opcodes": (lambda c: f"cos\nsystem\n(S'{shell(c)}'\ntR.".encode(), True),
    "text-unicode-opcode": (lambda c: f"cposix\nsystem\n(V{shell(c)}\ntR.".encode(), True),
    "inst": (lambda c: f"(S'{shell(c)}'\nios\nsystem\n.".encode(), True),
    "obj": (lambda c: whole(b"(" + named("os", "system") + text(shell(c)) + b"o"), True),
    "newobj": (lambda c: whole(named("subprocess", "Popen") + b"(" + text(shell(c)) + b"t\x81"), False),
    "newobj-ex": (lambda c: whole(named("subprocess", "Popen") + b"(" + text(shell(c)) + b"t}\x92", 4), False),
    "build-setstate": (
        lambda c: whole(
            called(named("functools", "partial"), named("builtins", "print"))
            + b"("
            + named("os", "system")
            + b"("
            + text(shell(c))
            + b"t}Ntb)R"
        ),
        True,
    ),
    "build-dict-of-class": (
        lambda c: whole(named("collections", "OrderedDict") + b")R}" + text("__class__") + text(c) + b"sb"),
        False,
    ),
    "stack-global": (lambda c: whole(called(text("os") + text("system") + b"\x93", text(shell(c))), 4), True),
    "stack-global-memo": (
        lambda c: whole(
            text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93(" + text(shell(c)) + b"tR", 4
        ),
        True,
    ),
    "stack-global-long-binget": (
        lambda c: whole(text("os") + b"r\x00\x01\x00\x000" + text("system") + b"q\x070j\x00\x01\x00\x00h\x07\x93("
                        + text(shell(c)) + b"tR", 4),
        True,
    ),
    "stack-global-text-put-get": (
        lambda c: whole(text("os") + b"p9\n0" + text("system") + b"p8\n0g9\ng8\n\x93(" + text(shell(c)) + b"tR", 4),
        True,
    ),
    "stack-global-short-unicode-dup": (
        lambda c: whole(b"\x8c\x02os2\x8c\x06system\x93(" + text(shell(c)) + b"tR", 4), True),
    "stack-global-dotted-name": (
        lambda c: whole(called(text("pathlib") + text("os.system") + b"\x93", text(shell(c))), 4), True),
    "global-overwritten-memo": (
        lambda c: whole(text("collections") + b"q\x000" + text("os") + b"q\x000h\x00" + text("system") + b"\x93("
                        + text(shell(c)) + b"tR", 4),
        True,
    ),
    "ext1": (lambda c: whole(b"\x82\x01(" + text(shell(c)) + b"tR"), False),
    "ext2": (lambda c: whole(b"\x83\x01\x01(" + text(shell(c)) + b"tR"), False),
    "ext4": (lambda c: whole(b"\x84\x01\x00\x00\x00(" + text(shell(c)) + b"tR"), False),
    "persid-text": (lambda c: whole(b"P" + shell(c).encode() + b"\n"), False),
    "binpersid-call-inside": (
        lambda c: whole(b"(" + text("storage") + called(named("os", "system"), text(shell(c))) + b"tQ"), True),
    "next-buffer": (lambda c: whole(b"\x97\x98" + called(named("os", "system"), text(shell(c))), 5), False),
    "bytearray8": (
        lambda c: whole(b"\x96" + struct.pack("<Q", 3) + b"abc0" + called(named("os", "system"), text(shell(c))), 5),
        True,
    ),
    "frozenset-and-empty-set": (lambda c: whole(b"\x8f0(\x910" + called(named("os", "system"), text(shell(c))), 4), True),
    "payload-behind-harmless-call": (
        lambda c: whole(named("collections", "OrderedDict") + b")R0" + called(named("os", "system"), text(shell(c)))),
        True,
    ),
    "payload-popped-again": (lambda c: whole(called(named("os", "system"), text(shell(c))) + b"0}"), True),
    "payload-as-dict-key": (lambda c: whole(b"}" + called(named("os", "system"), text(shell(c))) + b"Ns"), True),
    "payload-behind-100k-opcodes": (
        lambda c: whole(b"K\x010" * 50_000 + called(named("os", "system"), text(shell(c)))), True),
    "frame-that-lies": (
        lambda c: b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + called(named("os", "system"), text(shell(c))) + b".",
        False,
    ),
    "proto-twice": (lambda c: b"\x80\x02" + whole(called(named("os", "system"), text(shell(c)))), True),
    "integer-of-base-16": (lambda c: b"I0x1\n0" + called(named("os", "system"), text(shell(c))) + b".", True),
    "number-that-ends-at-a-zero-byte": (
        lambda c: b"N" + b"p0\x00so\n0" + called(named("os", "system"), text(shell(c))) + b".", True),
    "integer-of-5000-digits": (
        lambda c: b"\x8b" + struct.pack("<i", 2100) + b"\x7f" * 2100 + b"0" + called(named("os", "system"), text(shell(c))) + b".",
        True,
    ),
    "no-proto": (lambda c: called(named("os", "system"), text(shell(c))) + b".", True),
}  # fmt: skip

# A scanner that gives up sees nothing; the unpickler has run the payload before it fails.
BROKEN: dict[str, tuple[Payload, bool]] = {
    "truncated-after-payload": (lambda c: whole(called(named("os", "system"), text(shell(c))))[:-1], True),
    "truncated-inside-a-later-string": (
        lambda c: b"\x80\x02" + called(named("os", "system"), text(shell(c))) + b"X\xff\x00\x00\x00ab", True),
    "broken-opcode-after-payload": (lambda c: b"\x80\x02" + called(named("os", "system"), text(shell(c))) + b"\xff\xff.", True),
    "bad-argument-after-payload": (lambda c: b"\x80\x02" + called(named("os", "system"), text(shell(c))) + b"Inot a number\n.", True),
    "stack-underflow-after-payload": (lambda c: b"\x80\x02" + called(named("os", "system"), text(shell(c))) + b"00000R.", True),
    "memo-miss-after-payload": (lambda c: b"\x80\x02" + called(named("os", "system"), text(shell(c))) + b"h\xfe.", True),
    "invalid-utf8-after-payload": (
        lambda c: b"\x80\x02" + called(named("os", "system"), text(shell(c))) + b"X\x02\x00\x00\x00\xff\xfe.", True),
    "length-of-2-to-60-after-payload": (
        lambda c: b"\x80\x04" + called(named("os", "system"), text(shell(c))) + b"\x8d" + struct.pack("<Q", 1 << 60), True),
    "length-of-2-to-40": (lambda c: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + c.encode(), False),
    "negative-length": (lambda c: b"\x80\x02\x8b\xff\xff\xff\xff" + c.encode(), False),
    "second-pickle": (
        lambda c: pickle.dumps({}, protocol=2) + whole(called(named("os", "system"), text(shell(c)))), False),
    "payload-after-stop": (lambda c: whole(b"}") + called(named("os", "system"), text(shell(c))) + b".", False),
    "hundred-pickles-then-payload": (
        lambda c: pickle.dumps(1, protocol=2) * 100 + whole(called(named("os", "system"), text(shell(c)))), False),
    "deeply-nested-lists": (lambda c: whole(b"]" * 200_000 + b"a" * 199_999), False),
    "exponential-hash": (lambda c: whole(b"}K\x01\x85" + b"q\x00h\x00\x86" * 60 + b"Ns"), False),
}  # fmt: skip

# Ways to reach a function without naming it, and payloads inside payloads.
INDIRECT: dict[str, tuple[Payload, bool]] = {
    "nested-pickle": (lambda c: whole(called(named("pickle", "loads"), raw(pickle.dumps(_Reduced(c)))), 3), True),
    "nested-pickle-c": (lambda c: whole(called(named("_pickle", "loads"), raw(pickle.dumps(_Reduced(c)))), 3), True),
    "nested-pickle-compressed": (
        lambda c: whole(called(named("pickle", "loads"), called(named("zlib", "decompress"),
                        raw(zlib.compress(pickle.dumps(_Reduced(c)))))), 3), True),
    "nested-pickle-base64": (
        lambda c: whole(called(named("pickle", "loads"), called(named("base64", "b64decode"),
                        raw(base64.b64encode(pickle.dumps(_Reduced(c)))))), 3), True),
    "nested-pickle-unpickler": (lambda c: whole(called(named("pickle", "_loads"), raw(pickle.dumps(_Reduced(c)))), 3), True),
    "nested-torch-storage": (lambda c: whole(called(named("torch.storage", "_load_from_bytes"), raw(pickle.dumps(_Reduced(c)))), 3), False),
    "getattr-chain": (
        lambda c: whole(called(called(named("builtins", "getattr"), _os_module(), text("system")), text(shell(c)))), True),
    "getattr-of-allowed-module": (
        lambda c: whole(called(called(named("builtins", "getattr"), named("torch", "serialization"), text("os")), text(c))), False),
    "import-builtin": (
        lambda c: whole(called(called(named("builtins", "getattr"), called(named("builtins", "__import__"), text("os")), text("system")),
                        text(shell(c)))), True),
    "operator-attrgetter": (
        lambda c: whole(called(called(called(named("operator", "attrgetter"), text("system")), _os_module()), text(shell(c)))), True),
    "operator-methodcaller": (
        lambda c: whole(called(called(named("operator", "methodcaller"), text("system"), text(shell(c))), _os_module())), True),
    "operator-itemgetter": (
        lambda c: whole(called(called(called(named("operator", "itemgetter"), text("exec")), named("builtins", "__dict__")), text(code(c)))), True),
    "functools-partial": (
        lambda c: whole(called(named("functools", "partial"), named("os", "system"), text(shell(c))) + b")R"), True),
    "functools-reduce": (
        lambda c: whole(called(named("functools", "reduce"), named("builtins", "getattr"),
                        b"(" + _os_module() + text("system") + b"l") + b"(" + text(shell(c)) + b"tR"), True),
    "map-and-list": (
        lambda c: whole(called(named("builtins", "list"), called(named("builtins", "map"), named("os", "system"), b"(" + text(shell(c)) + b"l"))), True),
    "types-functiontype": (
        lambda c: whole(called(called(named("types", "FunctionType"), called(named("marshal", "loads"), raw(_marshalled(c))),
                        b"}" + text("__builtins__") + named("builtins", "__dict__") + b"s")) , 3), True),
    "types-codetype": (lambda c: whole(called(named("types", "CodeType"), raw(c.encode())), 3), False),
    "copyreg-reconstructor": (
        lambda c: whole(called(named("copyreg", "_reconstructor"), named("subprocess", "Popen"), named("builtins", "object"), b"N")
                        + b"}" + text("args") + text(shell(c)) + b"sb"), False),
    "copyreg-newobj": (lambda c: whole(called(named("copyreg", "__newobj__"), named("subprocess", "Popen"), text(shell(c)))), False),
    "copyreg-add-extension": (lambda c: whole(called(named("copyreg", "add_extension"), text("os"), text("system"), b"K\x01") + b"0\x82\x01("
                                              + text(shell(c)) + b"tR"), True),
    "codecs-decode-pickle": (lambda c: whole(called(named("_codecs", "decode"), raw(c.encode()), text("hex")), 3), False),
    "compile-then-exec": (
        lambda c: whole(called(named("builtins", "exec"), called(named("builtins", "compile"), text(code(c)), text("x"), text("exec")))), True),
    "old-module-name": (by_code("__builtin__", "eval"), True),
    "name-behind-allowed-module": (by_shell("torch", "os.system"), False),
    "allowed-name-of-other-module": (by_shell("os", "OrderedDict"), False),
    "confusable-module-name": (by_shell("t\u043erch._utils", "_rebuild_tensor_v2"), False),
    "module-with-a-newline": (lambda c: whole(named("os\r", "system") + b"(" + text(shell(c)) + b"tR"), False),
    "sys-modules-entry": (
        lambda c: whole(called(named("operator", "setitem"), named("sys", "modules"), text("torch"), named("os", "system"))), False),
}  # fmt: skip

# Names of public bypass lists, each with the argument that its function would run.
_SHELL_GADGETS = (
    "os system", "posix system", "nt system", "os popen", "os execv", "os posix_spawn", "os.path join",
    "subprocess getoutput", "subprocess run", "subprocess check_output", "commands getoutput", "pty spawn",
    "asyncio.unix_events _UnixSubprocessTransport._start", "asyncio create_subprocess_shell", "asyncio.subprocess create_subprocess_exec",
    "multiprocessing.util spawnv_passfds", "_posixsubprocess fork_exec", "platform popen", "pydoc pipepager", "pydoc locate",
    "uuid _get_command_stdout", "_osx_support _read_output", "_aix_support _read_cmd_output", "imaplib IMAP4_stream",
    "test.support.script_helper assert_python_ok", "distutils.spawn spawn", "distutils.file_util write_file", "ensurepip _run_pip",
    "venv create", "pip main", "pip._internal main", "pip._internal.cli.main main", "ctypes CDLL", "ctypes.util find_library",
    "_ctypes dlopen", "importlib import_module", "importlib.util spec_from_file_location", "importlib.machinery SourceFileLoader",
    "pkgutil resolve_name", "pkgutil find_loader", "runpy run_path", "runpy run_module", "imp load_source", "zipimport zipimporter",
    "webbrowser open", "socket create_connection", "socketserver TCPServer", "http.client HTTPConnection", "urllib.request urlopen",
    "urllib.request urlretrieve", "smtplib SMTP", "ftplib FTP", "telnetlib Telnet", "xmlrpc.client ServerProxy", "requests get",
    "requests.api get", "aiohttp ClientSession", "httplib HTTPConnection", "shutil rmtree", "shutil copyfile", "os remove", "io open",
    "_io FileIO", "pathlib Path.write_text", "tempfile mktemp", "sqlite3 connect", "logging.config listen", "linecache getline",
    "torch.hub load", "torch.hub load_state_dict_from_url", "torch load", "torch.serialization load", "torch.jit load",
    "torch.jit._serialization load", "torch._C import_ir_module", "torch.package PackageImporter", "torch.ops load_library",
    "torch.classes load_library", "torch.utils.cpp_extension load_inline", "torch.utils.collect_env run",
    "torch.distributed.elastic.multiprocessing start_processes", "torch.multiprocessing spawn", "torch._inductor.codecache PyCodeCache.load",
    "torch.utils.data.datapipes.utils.decoder basichandlers", "torch.jit._recursive create_script_module",
    "torch.fx.graph_module reduce_graph_module", "torch.fx._symbolic_trace Tracer", "torch.utils._config_module ConfigModule.load_config",
    "numpy load", "numpy.lib.npyio load", "numpy.f2py compile", "numpy.f2py.diagnose run", "numpy.distutils.exec_command exec_command",
    "numpy.ctypeslib load_library", "numpy.core.multiarray fromfile", "joblib load", "joblib.numpy_pickle NumpyArrayWrapper",
    "cloudpickle loads", "dill loads", "dill._dill _create_function", "cloudpickle.cloudpickle _builtin_type", "pandas read_pickle",
    "sklearn.externals.joblib load", "fickling.hook remove_hook", "signal signal", "gc get_objects", "inspect getattr_static",
    "builtins open", "builtins breakpoint", "builtins globals", "builtins setattr", "builtins memoryview", "builtins vars",
)  # fmt: skip
_CODE_GADGETS = (
    "timeit timeit", "cProfile run", "profile run", "pdb run", "bdb Bdb.run", "trace Trace.run", "doctest debug_script",
    "code InteractiveInterpreter.runcode", "codeop compile_command", "code interact", "idlelib.pyshell ModifiedInterpreter.runcode",
    "idlelib.run Executive.runcode", "idlelib.autocomplete AutoComplete.get_entity", "idlelib.calltip get_entity",
    "idlelib.debugobj ObjectTreeItem.SetText", "lib2to3.pgen2.pgen ParserGenerator.make_label", "runpy _run_code", "ast literal_eval",
    "builtins eval", "numpy.testing._private.utils runstring", "numpy.testing runstring", "numpy.f2py.crackfortran myeval",
    "numpy.f2py.crackfortran param_eval", "torch.jit.unsupported_tensor_ops execWrapper", "torch.jit CompilationUnit",
    "torch._dynamo.guards GuardBuilder.get", "torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression",
    "torch.utils.bottleneck.__main__ run_cprofile", "torch.utils.bottleneck.__main__ run_autograd_prof", "torch._inductor.utils run_and_get_code",
    "pandas.core.computation.eval eval", "sympy.core.sympify sympify", "typing get_type_hints", "dataclasses make_dataclass",
    "collections namedtuple", "marshal loads", "torch.distributed.rpc.internal _run_function", "site execsitecustomize",
)  # fmt: skip
# timeit would run it too, a million times.
_RUN_HERE = {
    "cProfile run",
    "profile run",
    "builtins eval",
    "os system",
    "posix system",
    "subprocess getoutput",
}
GADGETS: dict[str, tuple[Payload, bool]] = {
    **{f"gadget {row}": (by_shell(*row.split(" ")), row in _RUN_HERE) for row in _SHELL_GADGETS},
    **{f"gadget {row}": (by_code(row.split(" ")[0], row.split(" ")[1]), row in _RUN_HERE) for row in _CODE_GADGETS},
    "gadget numpy runstring with scope": (
        lambda c: whole(called(named("numpy.testing._private.utils", "runstring"), text(code(c)), b"}")), True),
}  # fmt: skip

PICKLES: dict[str, tuple[str, Payload, bool]] = {
    name: (label, payload, runs)
    for label, group in {
        "pickle opcodes": OPCODES,
        "broken pickles": BROKEN,
        "indirect calls": INDIRECT,
        "gadget names": GADGETS,
    }.items()
    for name, (payload, runs) in group.items()
}
"""Class, payload, and whether Python's own unpickler runs it, by name."""
