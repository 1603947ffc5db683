#!/usr/bin/env bash
# Build the images: images/build.sh [cpu] [gpu] [hooks]; without names, all three.
#
#   BASE_IMAGE     what they stand on; pin it: name@sha256:…
#   BUILDER        docker, podman or buildah; by default the first of them that is installed
#   TAG            of every image; by default the version, which the pipeline asks for
#   NAME           of the cpu image; the others append -gpu and -hooks. By default model-quarantine, which the pipeline asks for
#   BUILD_OPTIONS  further options for the builder, split at spaces
#   SBOM_DIR       where the SBOMs are copied to; by default build/sbom
#   SSL_CERT_FILE  a private authority's bundle, mounted while building with podman or buildah
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "images: $1" >&2; exit 3; }

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' defense_core/__init__.py)
builder=${BUILDER:-}
for each in docker podman buildah; do
  [ -z "$builder" ] || break
  command -v "$each" >/dev/null || continue
  if [ "$each" = docker ] && ! docker info >/dev/null 2>&1; then continue; fi  # installed, without an engine
  builder=$each
done
[ -n "$builder" ] || die "expected docker (with its engine running), podman or buildah, got none of them"
kind=$(basename "$builder")
name=${NAME:-model-quarantine}
tag=${TAG:-$version}
sbom_dir=${SBOM_DIR:-build/sbom}
base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' images/Dockerfile)}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision="$revision-dirty"
digest=unknown
case $base in *@sha256:*) digest=${base#*@} ;; esac

options=()
read -r -a further <<<"${BUILD_OPTIONS:-}"
if [ "$kind" != docker ]; then
  # The OCI format has no health check, and would drop it.
  options+=(--format docker)
  [ -z "${SSL_CERT_FILE:-}" ] || options+=(--volume "$SSL_CERT_FILE:/etc/ssl/certs/ca-certificates.crt:ro")
fi

build() {  # FLAVOUR PARTS IMAGE
  "$builder" build "${options[@]}" "${further[@]}" --file images/Dockerfile --target "$1" --tag "$3" \
    --build-arg "BASE_IMAGE=$base" --build-arg "FLAVOUR=$1" --build-arg "PARTS=$2" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$revision" --build-arg "BASE_NAME=${base%@*}" --build-arg "BASE_DIGEST=$digest" .
}

copy_sbom() {  # IMAGE FILE
  local inside=/opt/quarantine/share/image.cdx.json container
  if [ "$kind" = buildah ]; then
    container=$("$builder" from --pull-never "$1")
    "$builder" run "$container" -- cat "$inside" >"$2"
    "$builder" rm "$container" >/dev/null
  else
    container=$("$builder" create "$1")
    "$builder" cp "$container:$inside" "$2"
    "$builder" rm "$container" >/dev/null
  fi
}

mkdir -p "$sbom_dir"
[ $# -gt 0 ] || set -- cpu gpu hooks
for flavour in "$@"; do
  case $flavour in
    cpu) parts=jobs image=$name:$tag ;;
    gpu) parts=jobs image=$name-gpu:$tag ;;
    hooks) parts=hooks image=$name-hooks:$tag ;;
    *) die "expected cpu, gpu or hooks, got $flavour" ;;
  esac
  started=$SECONDS
  build "$flavour" "$parts" "$image"
  copy_sbom "$image" "$sbom_dir/$flavour.cdx.json"
  echo "images: $image in $((SECONDS - started)) s, SBOM in $sbom_dir/$flavour.cdx.json"
done
