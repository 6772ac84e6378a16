FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release -p stoker && cp target/release/stoker /stoker

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 stoker && useradd --create-home --uid 10001 --gid stoker stoker \
    && mkdir /data && chown stoker:stoker /data
COPY --from=build /stoker /usr/local/bin/stoker
# By number: Kubernetes can't tell that a user with a name is not root (runAsNonRoot).
USER 10001:10001
ENV STOKER_DATA_DIR=/data
EXPOSE 8080
ENTRYPOINT ["stoker"]
