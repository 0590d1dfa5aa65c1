#!/usr/bin/env bash
# Build the real Dockerfile against a stand-in base (tests/container/base.sh), look at the image, and train in it.
#
#     bash tests/container/build.sh          # root, buildah, debootstrap; ten minutes and 15 GB, 10 of them kept as images
#
# BASE (an image there already; NVIDIA's, where it can be fetched) may be set.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
export STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}" BUILDAH_ISOLATION="${BUILDAH_ISOLATION:-chroot}"

base="${BASE:-localhost/megatron-btx-base}" image=localhost/megatron-btx
fail() { echo "error: $*" >&2; exit 1; }
inside() { buildah run "$container" -- "$@"; }
expect() { # expect WHAT FOUND EXPECTED
    [ "$2" = "$3" ] || fail "$1: found $2, expected $3"
    echo "ok: $1: $2"
}

buildah inspect --type image "$base" >/dev/null 2>&1 || bash tests/container/base.sh "$base"
bare="$(buildah from --pull-never "$base")"
trap 'buildah rm "$bare" >/dev/null' EXIT
torch_of_base="$(buildah run "$bare" -- python3 -c 'import torch; print(torch.__version__, torch.__file__)')"

commit="$(git rev-parse HEAD)" version="$(awk -F'"' '/^version = / { print $2 }' pyproject.toml)"
SECONDS=0
buildah bud --pull-never --build-arg BASE="$base" --build-arg COMMIT="$commit" --build-arg VERSION="$version" --tag "$image" .
echo "built in $SECONDS s"

container="$(buildah from --pull-never "$image")"
trap 'buildah rm "$bare" "$container" >/dev/null' EXIT
expect "torch" "$(inside python -c 'import torch; print(torch.__version__, torch.__file__)')" "$torch_of_base"
expect "user" "$(inside id -u)" 10001
label() { buildah inspect --type image --format "{{index .OCIv1.Config.Labels \"org.opencontainers.image.$1\"}}" "$image"; }
expect "commit" "$(label revision)" "$commit"
expect "version" "$(label version)" "$version"
expect "not sent" "$(inside sh -c 'cd /opt/megatron-btx && ls -d .git .ci docs tests benchmarks 2>/dev/null | wc -l')" 0
inside sh -c 'touch /opt/megatron-btx/x 2>/dev/null' && fail "the user can change the program"
inside btx doctor
inside bash /opt/megatron-btx/tools/first_step.sh /home/btx/mixture --train-iters 5
echo "ok: a mixture trained for 5 steps as user 10001"
