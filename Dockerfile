# syntax=docker/dockerfile:1

FROM python:3.11-slim AS build
WORKDIR /build
RUN ["python", "-m", "venv", "/opt/nix-cache-proxy"]
ENV PATH=/opt/nix-cache-proxy/bin:$PATH
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation . \
    && pip uninstall --yes flit_core setuptools pip

FROM python:3.11-slim
COPY --from=build /opt/nix-cache-proxy /opt/nix-cache-proxy
RUN install -d -o 65532 -g 65532 /var/cache/nix-cache-proxy
ENV PATH=/opt/nix-cache-proxy/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
VOLUME /var/cache/nix-cache-proxy
EXPOSE 8627
# No curl here; and no proxy that the environment may name, since this asks ourselves.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "from urllib import request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8627/healthz', timeout=3)"]
ENTRYPOINT ["nix-cache-proxy"]
CMD ["serve", "--listen", "0.0.0.0:8627", "--store", "/var/cache/nix-cache-proxy"]
