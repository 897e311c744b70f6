"""Writes dispatch.c from hotloops.h: one table of kernels per instruction set, one exported function per kernel.

usage: build_dispatch.py hotloops.h dispatch.c ISA [ISA ...]
"""

import pathlib
import re
import sys

header, output, *built = sys.argv[1:]
isas = [isa for isa in ("baseline", "neon", "avx2", "avx512") if isa in built]  # from the lowest
text = re.sub(r"/\*.*?\*/", "", pathlib.Path(header).read_text(), flags=re.S)
prototypes = re.findall(r"^int (hl_\w+_f(?:32|64))\(([^)]*)\);", text, flags=re.M)

USABLE = {  # lowest first
    "baseline": "1",
    "neon": "1",
    "avx2": '__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")',
    "avx512": " && ".join(f'__builtin_cpu_supports("avx512{x}")' for x in ("f", "bw", "dq", "vl", "cd")),
}

isas.sort(key=list(USABLE).index)  # meson hands the keys of a dictionary over in alphabetical order

out = ["/* Made by build_dispatch.py from hotloops.h. */", '#include "hotloops.h"', "#include <stdlib.h>", "#include <string.h>"]
for isa in isas:
    out += [f"int {name}_{isa}({args});" for name, args in prototypes]
out += ["typedef struct {", "    const char *isa;"]
out += [f"    int (*{name})({args});" for name, args in prototypes]
out += ["} table;", "static const table tables[] = {"]
for isa in isas:
    out += [f'    {{"{isa}", ' + ", ".join(f"{name}_{isa}" for name, _ in prototypes) + "},"]
out += ["};", f"enum {{ TABLES = {len(isas)} }};", "static const table *active = &tables[0];"]
out += ["static int usable(int i)", "{"]
if "avx2" in isas:
    out += ["    __builtin_cpu_init();"]
out += [f"    if (i == {i}) return {USABLE[isa]};" for i, isa in enumerate(isas)]
out += ["    return 0;", "}"]
out += [
    """
int hl_isa_select(const char *name)
{
    for (int i = TABLES; i-- > 0;)
        if ((!name || !strcmp(tables[i].isa, name)) && usable(i)) {
            active = &tables[i];
            return HL_OK;
        }
    return HL_INVALID;
}
const char *hl_isa_name(void) { return active->isa; }
const char *hl_isa_list(int i) { return i >= 0 && i < TABLES && usable(i) ? tables[i].isa : NULL; }
/* HOTLOOPS_ISA asks for a set, never above what the CPU has: what cannot run leaves the best that can. */
__attribute__((constructor)) static void init(void)
{
    const char *wanted = getenv("HOTLOOPS_ISA");
    if (!wanted || hl_isa_select(wanted)) hl_isa_select(NULL);
}"""
]
for name, args in prototypes:
    names = ", ".join(re.sub(r".*?(\w+)$", r"\1", arg.strip()) for arg in args.split(","))
    arrays = re.findall(r"\*(\w+)", args)
    at = " | ".join(f"(uintptr_t){a} % sizeof(*{a})" for a in arrays if a != "plan")
    out += [f"int {name}({args}) {{ return {at} ? HL_MISALIGNED : active->{name}({names}); }}"]
pathlib.Path(output).write_text("\n".join(out) + "\n")
