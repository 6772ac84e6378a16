// The guide's classes, unchanged, beside a running fleet: services that were written against the old router go on working.
import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import test, { after, before } from 'node:test';
import amqp from 'amqplib';
import pg from 'pg';
import PostgreSQLIntegration from './guide/PostgreSQLIntegration.js';
import RabbitMQIntegration from './guide/RabbitMQIntegration.js';

const url = process.env.FLEET_URL;
const model = 'SmolLM2-135M-Instruct';
const post = (path, body, headers = {}) =>
  fetch(url + path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', ...headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });

let queue;
let database;
const responses = new Map();
let notify = () => {};

before(async () => {
  queue = new RabbitMQIntegration({ url: process.env.AMQP_URL });
  await queue.connect();
  await queue.consumeResponses(async (response) => {
    responses.set(response.id, response);
    notify();
  });
  const at = new URL(process.env.POSTGRES_URL);
  database = new PostgreSQLIntegration({
    host: at.hostname,
    port: Number(at.port || 5432),
    database: at.pathname.slice(1),
    user: decodeURIComponent(at.username),
    password: decodeURIComponent(at.password),
  });
});

after(async () => {
  await queue.cleanup();
  await database.cleanup();
});

async function answered(id) {
  const deadline = Date.now() + 60_000;
  while (!responses.has(id)) {
    assert.ok(Date.now() < deadline, `no response for ${id} came within a minute`);
    await new Promise((resolve) => {
      notify = resolve;
      setTimeout(resolve, 200);
    });
  }
  return responses.get(id);
}

const unique = () => Math.random().toString(36).substring(2, 15);

test('publishRequest is answered on llm.responses', async () => {
  const id = unique();
  await queue.publishRequest({ id, prompt: 'a b c', model: 'echo', options: { maxTokens: 5 }, userId: 'u1', colour: 'red' });
  const response = await answered(id);
  assert.equal(response.success, true);
  assert.equal(response.text, 'a b c a b');
  assert.equal(response.tokens, 5);
  assert.equal(response.userId, 'u1');
  assert.equal(response.metadata.request.colour, 'red');
});

test('a request that is none is answered with an error that names the field', async () => {
  const id = unique();
  await queue.publishRequest({ id, prompt: 'a', model: 'echo', options: { temperature: 3 } });
  const response = await answered(id);
  assert.equal(response.success, false);
  assert.equal(response.error.param, 'options.temperature');
});

test('an unknown model is answered with an error', async () => {
  const id = unique();
  await queue.publishRequest({ id, prompt: 'a', model: 'no-such-model' });
  assert.equal((await answered(id)).error.code, 'model_not_found');
});

test('the same request published twice is one job with one outcome', async () => {
  const id = unique();
  const request = { id, prompt: 'x y', model: 'echo', options: { maxTokens: 3 }, userId: id };
  await queue.publishRequest(request);
  await answered(id);
  responses.delete(id);
  await queue.publishRequest(request);
  assert.equal((await answered(id)).text, 'x y x');
  assert.equal((await database.getUserUsage(id)).request_count, '1');
});

test('an id that is taken by another body is refused', async () => {
  const id = unique();
  await queue.publishRequest({ id, prompt: 'one', model: 'echo', options: { maxTokens: 2 } });
  await answered(id);
  responses.delete(id);
  await queue.publishRequest({ id, prompt: 'another', model: 'echo', options: { maxTokens: 2 } });
  assert.equal((await answered(id)).error.code, 'id_taken');
});

test('reply_to gets the outcome, direct reply-to too', async () => {
  const connection = await amqp.connect(process.env.AMQP_URL);
  const channel = await connection.createChannel();
  const got = new Promise((resolve) => channel.consume('amq.rabbitmq.reply-to', resolve, { noAck: true }));
  const body = JSON.stringify({ id: unique(), prompt: 'r s', model: 'echo', options: { maxTokens: 2 } });
  channel.publish('llm.exchange', 'llm.requests', Buffer.from(body), {
    replyTo: 'amq.rabbitmq.reply-to',
    correlationId: 'c-17',
  });
  const reply = await got;
  assert.equal(reply.properties.correlationId, 'c-17');
  assert.equal(JSON.parse(reply.content).text, 'r s');
  await connection.close();
});

test('invalid UTF-8 and broken JSON on the queue stop nothing', async () => {
  for (const junk of [Buffer.from([0xff, 0xfe, 0x7b]), Buffer.from('{"prompt":'), Buffer.from('[]')]) {
    await queue.channel.publish('llm.exchange', 'llm.requests', junk, { persistent: true });
  }
  const id = unique();
  await queue.publishRequest({ id, prompt: 'still here', model: 'echo', options: { maxTokens: 2 } });
  assert.equal((await answered(id)).text, 'still here');
});

test('getUserUsage and getSystemMetrics see our rows', async () => {
  const userId = unique();
  for (const prompt of ['a b', 'c d']) {
    const answer = await post('/api/generate', { prompt, options: { model: 'echo', maxTokens: 4 } }, { 'X-User-ID': userId });
    assert.equal(answer.status, 200);
  }
  let usage;
  for (let i = 0; i < 50; i += 1) {
    usage = await database.getUserUsage(userId);
    if (usage.request_count === '2') break;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.equal(usage.request_count, '2');
  assert.equal(usage.total_tokens, '8');
  assert.deepEqual(usage.models_used, ['echo']);
  const metrics = await database.getSystemMetrics();
  assert.ok(metrics.some((row) => row.model === 'echo'));
});

test('getCachedResponse finds an answer by its prompt', async () => {
  const prompt = `cached ${unique()}`;
  const answer = await post('/api/generate', { prompt, options: { model: 'echo', maxTokens: 2, temperature: 0 } });
  const { text } = await answer.json();
  const hash = crypto.createHash('sha256').update(prompt).digest('hex');
  let row = null;
  for (let i = 0; i < 50 && !row; i += 1) {
    row = await database.getCachedResponse(hash);
    if (!row) await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.equal(row.response, text);
  const again = await (await post('/api/generate', { prompt, options: { model: 'echo', maxTokens: 2, temperature: 0 } })).json();
  assert.equal(again.text, text);
  assert.equal(again.metadata.cached, true);
});

test('tokens of a queued request come on its Redis channel and its row is one', async () => {
  const id = unique();
  await queue.publishRequest({ id, prompt: 'p q', model: 'echo', options: { maxTokens: 6 } });
  await answered(id);
  const client = new pg.Client({ connectionString: process.env.POSTGRES_URL });
  await client.connect();
  const { rows } = await client.query('SELECT tokens, finish_reason, attempts FROM llm_requests WHERE job_id = $1', [id]);
  await client.end();
  assert.deepEqual(rows, [{ tokens: 6, finish_reason: 'length', attempts: 1 }]);
});

test('the hook for generation reads what it needs', async () => {
  for (const path of ['/api/generate', '/api/llm/generate']) {
    const response = await post(path, { prompt: 'h i', options: { model: 'echo', maxTokens: 3 } });
    const data = await response.json();
    assert.ok(data.success);
    assert.equal(data.text, 'h i h');
    assert.equal(data.tokens, 3);
    assert.equal(data.metadata.model, 'echo');
    assert.equal(typeof data.metadata.executionTime, 'number');
    assert.deepEqual(Object.keys(data.result).sort(), ['executionTime', 'model', 'text', 'tokens']);
  }
});

// The loop of the guide's useLLMStreaming, which splits each network chunk by lines and keeps no rest.
async function hookStream(body) {
  const response = await post('/api/llm/stream', body);
  if (!response.ok) throw new Error(`HTTP ${response.status}: ${response.statusText}`);
  const tokens = [];
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  while (true) {
    const { done, value } = await reader.read();
    if (done) return tokens;
    for (const line of decoder.decode(value).split('\n')) {
      if (!line.startsWith('data: ')) continue;
      const data = line.slice(6);
      if (data === '[DONE]') return tokens;
      tokens.push(JSON.parse(data));
    }
  }
}

test('the hook for streaming reads every token', async () => {
  const tokens = await hookStream({ prompt: 'Count to three.', options: { model, maxTokens: 24, temperature: 0 } });
  assert.ok(tokens.length > 1);
  assert.ok(tokens.map((t) => t.token).join('').length > 5);
});

test('bad input is a clear 400 that names the field', async () => {
  const cases = [
    ['{"prompt":', null],
    [{ prompt: '' }, 'prompt'],
    [{}, 'prompt'],
    [{ prompt: 7 }, 'prompt'],
    [{ prompt: 'a', options: { temperature: 3 } }, 'temperature'],
    [{ prompt: 'a', options: { maxTokens: 0 } }, 'maxTokens'],
    [{ prompt: 'a', options: { maxTokens: 1e9 } }, 'maxTokens'],
  ];
  for (const [body, field] of cases) {
    const response = await post('/api/generate', body);
    const answer = await response.json();
    assert.equal(response.status, 400, JSON.stringify(body));
    assert.equal(answer.success, false);
    if (field) assert.ok(answer.error.includes(field), `${JSON.stringify(body)}: ${answer.error}`);
  }
  const large = await post('/api/generate', { prompt: 'x'.repeat(11 * 1024 * 1024) });
  assert.equal(large.status, 413);
});

test('health and models', async () => {
  const health = await (await fetch(`${url}/health`)).json();
  assert.equal(health.status, 'healthy');
  const { success, models } = await (await fetch(`${url}/api/models`)).json();
  assert.ok(success && models.some((m) => m.name === model));
  const { success: ok, metrics } = await (await fetch(`${url}/api/metrics`)).json();
  assert.ok(ok && metrics);
});
