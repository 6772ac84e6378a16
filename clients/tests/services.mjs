// What the tests need of the services beside the fleet: `create NAME` and `drop NAME` a database, a free `port`.
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

// What an earlier fleet left in the front door and its answers would be mistaken for ours.
async function purge() {
  const connection = await amqp.connect(process.env.AMQP_URL);
  for (const queue of ['llm.requests', 'llm.responses', 'llm.errors', 'llm.metrics']) {
    const channel = await connection.createChannel();
    channel.on('error', () => {}); // there is no such queue yet
    await channel.purgeQueue(queue).catch(() => {});
  }
  await connection.close();
}

if (command === 'create') {
  await purge();
  await admin(`CREATE DATABASE ${name}`);
  const url = new URL(process.env.POSTGRES_URL);
  url.pathname = `/${name}`;
  console.log(url.href);
} else if (command === 'drop') {
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
