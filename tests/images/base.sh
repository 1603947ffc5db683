#!/usr/bin/env bash
# Make a base image from Debian's packages and import it into podman, for machines that reach no image registry.
#
#   QUARANTINE_TEST_BASE_IMAGE  its name; by default localhost/model-quarantine-base:bookworm
#   DEBIAN_MIRROR               where packages come from; by default debootstrap's own
set -euo pipefail

image=${QUARANTINE_TEST_BASE_IMAGE:-localhost/model-quarantine-base:bookworm}
for tool in debootstrap podman; do
  command -v "$tool" >/dev/null || { echo "base image: $tool is not installed" >&2; exit 3; }
done
if podman image exists "$image"; then
  echo "base image: $image is there"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" ${DEBIAN_MIRROR:-} \
  >"$folder/log" 2>&1 || { tail -n 20 "$folder/log" >&2; exit 1; }
rm -rf "$folder"/root/var/lib/apt/lists/* "$folder"/root/var/cache/apt/*
tar -C "$folder/root" -c . | podman import - "$image"
