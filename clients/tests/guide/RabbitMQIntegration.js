// integrations/RabbitMQIntegration.js
import amqp from 'amqplib';

class RabbitMQIntegration {
  constructor(config) {
    this.url = config.url || 'amqp://localhost';
    this.connection = null;
    this.channel = null;
    this.queues = {
      requests: 'llm.requests',
      responses: 'llm.responses',
      metrics: 'llm.metrics',
      errors: 'llm.errors'
    };
  }

  async connect() {
    this.connection = await amqp.connect(this.url);
    this.channel = await this.connection.createChannel();
    
    // Setup exchanges and queues
    await this.setupTopology();
    
    console.log('RabbitMQ connected successfully');
  }

  async setupTopology() {
    const exchange = 'llm.exchange';
    
    // Create exchange
    await this.channel.assertExchange(exchange, 'topic', { durable: true });
    
    // Create queues
    for (const [key, queueName] of Object.entries(this.queues)) {
      await this.channel.assertQueue(queueName, {
        durable: true,
        arguments: {
          'x-message-ttl': 86400000, // 24 hours
          'x-max-length': 10000
        }
      });
      
      // Bind queue to exchange
      const routingKey = `llm.${key}`;
      await this.channel.bindQueue(queueName, exchange, routingKey);
    }
  }

  async publishRequest(requestData) {
    const message = {
      id: requestData.id || generateId(),
      timestamp: new Date().toISOString(),
      ...requestData
    };
    
    await this.channel.publish(
      'llm.exchange',
      'llm.requests',
      Buffer.from(JSON.stringify(message)),
      { persistent: true }
    );
  }

  async publishResponse(responseData) {
    const message = {
      timestamp: new Date().toISOString(),
      ...responseData
    };
    
    await this.channel.publish(
      'llm.exchange',
      'llm.responses',
      Buffer.from(JSON.stringify(message)),
      { persistent: true }
    );
  }

  async publishMetrics(metricsData) {
    const message = {
      timestamp: new Date().toISOString(),
      ...metricsData
    };
    
    await this.channel.publish(
      'llm.exchange',
      'llm.metrics',
      Buffer.from(JSON.stringify(message)),
      { persistent: false } // Metrics don't need persistence
    );
  }

  async consumeRequests(handler) {
    await this.channel.consume(this.queues.requests, async (msg) => {
      if (msg) {
        try {
          const request = JSON.parse(msg.content.toString());
          await handler(request);
          this.channel.ack(msg);
        } catch (error) {
          console.error('Error processing request:', error);
          this.channel.nack(msg, false, false); // Don't requeue
        }
      }
    });
  }

  async consumeResponses(handler) {
    await this.channel.consume(this.queues.responses, async (msg) => {
      if (msg) {
        try {
          const response = JSON.parse(msg.content.toString());
          await handler(response);
          this.channel.ack(msg);
        } catch (error) {
          console.error('Error processing response:', error);
          this.channel.nack(msg, false, false);
        }
      }
    });
  }

  async cleanup() {
    if (this.channel) {
      await this.channel.close();
    }
    if (this.connection) {
      await this.connection.close();
    }
  }
}

function generateId() {
  return Math.random().toString(36).substring(2, 15) + 
         Math.random().toString(36).substring(2, 15);
}

export default RabbitMQIntegration;
