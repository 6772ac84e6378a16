// What the tests need of the services beside the fleet: empty queues and a database (`create NAME`, and `drop NAME` in the
// end), a free `port`.
import net from 'node:net';
import amqp from 'amqplib';
import pg from 'pg';

const [, , command, name] = process.argv;

async function admin(sql) {
  const client = new pg.Client({ connectionString: process.env.POSTGRES_URL });
  await client.connect();
  await client.query(sql);
  await client.end();
}

const queues = ['llm.requests', 'llm.responses', 'llm.errors', 'llm.metrics'];

// Gives each queue that is there to `use`, on a channel of its own: one that is not there closes its channel.
async function eachQueue(use) {
  const connection = await amqp.connect(process.env.AMQP_URL);
  for (const queue of queues) {
    const channel = await connection.createChannel();
    channel.on('error', () => {});
    const state = await channel.checkQueue(queue).catch(() => null);
    if (state) await use(channel, state);
  }
  await connection.close();
}

// The guide's classes know no other names, so the tests would take a running fleet's requests and answers for theirs.
async function checkUnused() {
  await eachQueue((_channel, { queue, consumerCount, messageCount }) => {
    const waiting = queue === 'llm.requests' ? messageCount : 0;
    if (consumerCount + waiting === 0) return;
    const { host } = new URL(process.env.AMQP_URL);
    console.error(
      `client tests: ${queue} on ${host} has ${consumerCount} consumers and ${messageCount} messages. A fleet seems to use ` +
        'this broker, and its messages would be lost. Set AMQP_URL to another one, start one for the tests ' +
        '(`SERVICES=private make test`), or set CLIENT_TESTS_PURGE=1 if nobody needs them.',
    );
    process.exit(1);
  });
}

// What an earlier fleet left in the front door and its answers would be mistaken for ours, and ours for the next one's.
const purge = () => eachQueue((channel, { queue }) => channel.purgeQueue(queue));

if (command === 'create') {
  if (process.env.CLIENT_TESTS_PURGE !== '1') await checkUnused();
  await purge();
  await admin(`CREATE DATABASE ${name}`);
  const url = new URL(process.env.POSTGRES_URL);
  url.pathname = `/${name}`;
  console.log(url.href);
} else if (command === 'drop') {
  await purge();
  const url = new URL(process.env.POSTGRES_URL);
  url.pathname = '/postgres';
  process.env.POSTGRES_URL = url.href;
  await admin(`DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
} else {
  const server = net.createServer().listen(0, '127.0.0.1', () => {
    console.log(server.address().port);
    server.close();
  });
}
