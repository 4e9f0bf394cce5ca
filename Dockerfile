# syntax=docker/dockerfile:1
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/nbdqcow
COPY requirements.lock ./
RUN /opt/nbdqcow/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY nbdqcow nbdqcow
RUN /opt/nbdqcow/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
COPY --from=build /opt/nbdqcow /opt/nbdqcow
ENV PATH=/opt/nbdqcow/bin:$PATH PYTHONUNBUFFERED=1
# Images are mounted here, owned by or writable for this user.
WORKDIR /images
USER 65532:65532
EXPOSE 10809
STOPSIGNAL SIGTERM
ENTRYPOINT ["nbdqcow"]
CMD ["--help"]
