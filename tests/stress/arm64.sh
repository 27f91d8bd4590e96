#!/usr/bin/env bash
# Tests on an ARM64 CPU that qemu emulates, from any Linux:
#
#     tests/stress/arm64.sh FOLDER              the core: exact, and the same bits; hours
#     tests/stress/arm64.sh FOLDER FILE -k ...  what pytest is given instead
#
# FOLDER gets Debian's Python for ARM64, the wheels and the compiled kernels, 500 MB, and a command
# `python` that runs them; a second run finds them there. Needs root, which debootstrap asks for, and
#     apt-get install qemu-user-static debootstrap
#
# Emulated on x86, loads and stores keep x86's order: a fault of ordering does not show here.
# tests/kernels/test_atomics.py reads the assembly for that.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,/^# Emulated/p' "$0" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
root=$folder/root
for command in qemu-aarch64-static debootstrap dpkg-deb; do
  command -v "$command" >/dev/null || { echo "$command: not found; see the head of $0" >&2; exit 2; }
done

if ! [ -x "$root/usr/bin/python3.11" ]; then
  rm -rf "$root"
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1 bookworm "$root" >&2
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi
if ! [ -d "$folder/site/numba" ]; then
  platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64)
  platforms+=(--platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64)
  "${PYTHON:-python3}" -m pip install --quiet --target "$folder/site" "${platforms[@]}" \
    --python-version 3.11 --only-binary=:all: \
    numpy numba ml_dtypes safetensors pytest hypothesis msgspec threadpoolctl rich matplotlib
fi
# As sys.executable, so that tests find it when they start a process: the kernel could not.
cat > "$folder/python" <<END
#!/bin/sh
export PYTHONHOME=$root/usr PYTHONPATH=$folder/site\${PYTHONPATH:+:\$PYTHONPATH}
export NUMBA_CACHE_DIR=\${NUMBA_CACHE_DIR:-$folder/kernels}
exec qemu-aarch64-static -L $root -0 $folder/python $root/usr/bin/python3.11 "\$@"
END
chmod +x "$folder/python"

"$folder/python" -m sgmv info
[ $# -gt 0 ] || set -- tests/core/test_lora.py tests/core/test_same_bits.py tests/core/test_workers.py \
  tests/kernels/test_modes.py tests/kernels/test_tiles.py
exec "$folder/python" -m pytest -q -p no:cacheprovider \
  -m "not browser and not compiles and not oracle" "$@"
