#!/usr/bin/env bash
# Create .venv-swift: OpenStack Swift (with its S3 interface) for the integration tests.
# Idempotent: does nothing when the environment already holds the pinned versions.
#
#   tests/integration/setup_swift.sh [PYTHON]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
environment="$root/.venv-swift"
python="${1:-python3}"
stamp="$environment/.installed"
# setuptools: swift and pyeclib still read their entry points and versions through pkg_resources, which newer releases dropped.
pins=("swift==2.38.3" "pyeclib==1.8.0" "setuptools<81")
wanted="$("$python" -c 'import sys; print(sys.version_info[:2])') ${pins[*]}"

if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    echo "swift: $environment is up to date"
    exit 0
fi

# pyeclib is a C extension over liberasurecode; neither has a wheel that brings it along.
if ! ldconfig -p | grep -q 'liberasurecode\.so\.1' || [[ ! -e /usr/include/liberasurecode/erasurecode.h ]]; then
    if [[ "$(id -u)" == 0 ]]; then
        apt-get install -y -q --no-install-recommends liberasurecode-dev ||
            { apt-get update -q && apt-get install -y -q --no-install-recommends liberasurecode-dev; }
    else
        echo "swift: expected Debian's liberasurecode-dev, got no such library. Run: sudo apt-get install liberasurecode-dev" >&2
        exit 1
    fi
fi

rm -rf "$environment"
"$python" -m venv "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check "${pins[@]}"
"$environment/bin/swift-proxy-server" --help >/dev/null
printf '%s' "$wanted" >"$stamp"
echo "swift: installed ${pins[*]} in $environment"
