-- For wrk: asks for the paths in a file in turn, with the headers that Nix sends, and prints JSON.
-- Arguments: the file, the number of threads.

local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init(args)
  wrk.headers["User-Agent"] = "curl/7.88.1 Nix/2.18.1"
  wrk.headers["Accept"] = "*/*"
  wrk.headers["Accept-Encoding"] = "zstd, br, gzip, deflate, bzip2, xz"
  requests = {}
  for path in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("GET", path)
  end
  at = math.floor(#requests * number / tonumber(args[2]))
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\nRESULT {"requests": %d, "seconds": %.6f, "bytes": %.0f, "refused": %d, "failed": %d, '
      .. '"p50_us": %.0f, "p99_us": %.0f}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
