// OpenAI's Node SDK, unchanged, against a running fleet (FLEET_URL).
import assert from 'node:assert/strict';
import test from 'node:test';
import OpenAI from 'openai';

const model = 'SmolLM2-135M-Instruct';
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const answer = 'The capital of France is Paris.';
const client = new OpenAI({ baseURL: `${process.env.FLEET_URL}/v1`, apiKey: 'none', maxRetries: 0 });

test('models are listed', async () => {
  const ids = (await client.models.list()).data.map((m) => m.id);
  assert.ok(ids.includes(model) && ids.includes('echo'));
});

test('chat', async () => {
  const completion = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(completion.choices[0].message.content, answer);
  assert.equal(completion.choices[0].finish_reason, 'stop');
  assert.equal(completion.usage.completion_tokens, 8);
});

test('chat streams', async () => {
  const stream = await client.chat.completions.create({ model, messages, temperature: 0, stream: true });
  const pieces = [];
  for await (const chunk of stream) pieces.push(chunk.choices[0]?.delta?.content ?? '');
  assert.equal(pieces.join(''), answer);
});

test('the stream helper finds the final message', async () => {
  const stream = client.chat.completions.stream({ model, messages, temperature: 0 });
  assert.equal(await stream.finalContent(), answer);
});

test('a schema is kept to', async () => {
  const schema = {
    type: 'object', properties: { capital: { enum: ['Paris', 'Rome'] } }, required: ['capital'], additionalProperties: false,
  };
  const completion = await client.chat.completions.create({
    model, messages, temperature: 0, response_format: { type: 'json_schema', json_schema: { name: 'answer', schema } },
  });
  assert.deepEqual(JSON.parse(completion.choices[0].message.content), { capital: 'Paris' });
});

test('a stream can be aborted', async () => {
  const stream = await client.chat.completions.create({ model, messages, temperature: 1, stream: true, max_tokens: 4000 });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) break;
  }
  assert.ok(stream.controller.signal.aborted);
});

test('errors are those of the SDK', async () => {
  await assert.rejects(client.chat.completions.create({ model: 'no-such-model', messages }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model, messages, temperature: 3 }), OpenAI.BadRequestError);
});
