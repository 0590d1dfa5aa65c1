#!/usr/bin/env bash
# Make a stand-in for the Dockerfile's base image where that cannot be fetched: Debian, a Python 3.12 of this machine,
# and in it a torch that is not the one of requirements.lock, so that a build that replaces it is seen.
#
#     bash tests/container/base.sh IMAGE          # root, debootstrap, buildah, uv; three minutes, 5 GB
#
# PYTHON_FOLDER (a folder with bin/python3.12), TORCH, DEBIAN (a mirror) and ROOTFS (a Debian made before) may be set.
set -euo pipefail

image="${1:?name of the image to make}"
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
uv="$(command -v uv || echo "$here/.bootstrap/bin/uv")"
python_folder="${PYTHON_FOLDER:-$("$here/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')}"
export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}" BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"

container="$(buildah from scratch)"
trap 'buildah rm "$container" >/dev/null' EXIT
root="$(buildah mount "$container")"
# What Debian's Python would need too.
libraries=ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,zlib1g,libreadline8,libncursesw6,libuuid1,libgomp1
if [ -n "${ROOTFS:-}" ]; then
    cp -a "$ROOTFS/." "$root"
else
    debootstrap --variant=minbase --include="$libraries" bookworm "$root" "${DEBIAN:-http://deb.debian.org/debian}" >&2
fi
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
# The certificates that this machine trusts: its package index may stand behind a proxy.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"

tar -C "$python_folder" --exclude='*/site-packages/*' --exclude='*/test' --exclude='*.a' -cf - bin/python3.12 lib |
    tar -C "$root/usr/local" -xf -
ln -sf python3.12 "$root/usr/local/bin/python3"
ln -sf python3.12 "$root/usr/local/bin/python"
chroot "$root" ldconfig # for libpython
chroot "$root" /usr/local/bin/python -c 'import ssl, sqlite3, ctypes, lzma, bz2, zlib'
"$uv" pip install --quiet --python "$root/usr/local/bin/python3.12" --break-system-packages \
    "torch==${TORCH:-2.13.0}" numpy
# Without a GPU nothing loads these, and every layer of the build is a copy of them.
find "$root/usr/local/lib" \( -name 'libcudnn_engines*' -o -name '*.a' \) -delete
buildah config --env SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    --env "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin" "$container"
buildah run "$container" -- python -c 'import torch; print("stand-in base with torch", torch.__version__)'
buildah commit --quiet "$container" "$image"
