"""Make stand-ins of glibc's libraries to link with, so that the kernels load where glibc is older than the build's.

glibc 2.34 moved threads and dlopen into libc.so.6 under a new version of their names, and whoever links with it asks
for that version. The functions are the old ones, and newer glibcs keep the old names: linked with these stand-ins,
which hold names alone, a library asks for what glibc has had since 2.2.5.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# What a static cudart takes of each library, by the version that x86-64 has of it.
LIBRARIES = {
    "libpthread.so.0": {
        "GLIBC_2.2.5": """
            pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
            pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy
            pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once
            pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
            pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
            pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
            pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock
            pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait
        """,
    },
    "libdl.so.2": {"GLIBC_2.2.5": "dlclose dlerror dlopen dlsym dlvsym", "GLIBC_2.3.4": "dlmopen"},
    "librt.so.1": {"GLIBC_2.2.5": "shm_open shm_unlink"},
}


def main() -> None:
    """Write libpthread.so, libdl.so and librt.so into the folder of the first argument, with the second's compiler."""
    folder, compiler = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    for soname, versions in LIBRARIES.items():
        stem = folder / soname.partition(".")[0]
        source, script, library = (stem.with_suffix(suffix) for suffix in (".c", ".map", ".so"))
        names = [name for version in versions.values() for name in version.split()]
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        script.write_text("".join(f"{version} {{ {'; '.join(n.split())}; }};\n" for version, n in versions.items()))
        subprocess.run(
            [compiler, "-x", "c", source, "-shared", "-nostdlib", "-fPIC", f"-Wl,-soname,{soname}",
             f"-Wl,--version-script,{script}", "-o", library],
            check=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
