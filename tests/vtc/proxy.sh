#!/bin/sh
# proxy.sh [-b LOOKUP_BUDGET] [-n NEGATIVE_TTL] [-r READ_TIMEOUT] [-s] ADDRESS:PORT[/PATH]...
#
# Become the daemon: on ./proxy.sock, with its store in ./store, in front of these upstreams.
# -s is upstream_down = "error". $PYTHON runs it; it trusts $KEY.
set -eu
lookup_budget=8s negative_ttl=60s read_timeout=20s upstream_down=not-found
while getopts b:n:r:s option; do
	case $option in
	b) lookup_budget=$OPTARG ;;
	n) negative_ttl=$OPTARG ;;
	r) read_timeout=$OPTARG ;;
	s) upstream_down=error ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))

cat >config.toml <<END
[server]
listen = ["unix:$PWD/proxy.sock"]
[store]
path = "$PWD/store"
min_free = 0
[trust]
keys = ["$KEY"]
[log]
format = "console"
level = "info"
[policy]
lookup_budget = "$lookup_budget"
negative_ttl = "$negative_ttl"
upstream_down = "$upstream_down"
[prefetch]
narinfos = false
nars = "off"
END
number=0
for address; do
	number=$((number + 1))
	cat >>config.toml <<END
[[upstream]]
name = "up$number"
url = "http://$address"
connect_timeout = "5s"
read_timeout = "$read_timeout"
END
done
exec "$PYTHON" -m proxy serve --config config.toml 2>&1
