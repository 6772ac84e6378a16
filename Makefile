# Two commands do everything: `make run` and `make test`.
.PHONY: run test model lint services services-stop

run: ## build, fetch the model, start the whole fleet in one process, ask it something, keep serving
	cargo run --release

test: ## make sure the services are there, then run all tests
	scripts/test.sh

model: ## fetch the default model
	cargo run --release -- model pull

lint: ## what CI checks before the tests
	scripts/lint.sh

services: ## RabbitMQ, Redis and Postgres for development; prints their addresses
	scripts/services.sh start

services-stop: ## stops those that `make services` or `make test` started
	scripts/services.sh stop
