// integrations/PostgreSQLIntegration.js
import pg from 'pg';

class PostgreSQLIntegration {
  constructor(config) {
    this.pool = new pg.Pool({
      host: config.host || 'localhost',
      port: config.port || 5432,
      database: config.database,
      user: config.user,
      password: config.password,
      max: config.maxConnections || 20,
      idleTimeoutMillis: 30000,
      connectionTimeoutMillis: 2000
    });
    
    this.initializeSchema();
  }

  async initializeSchema() {
    const client = await this.pool.connect();
    
    try {
      // Create tables for LLM data
      await client.query(`
        CREATE TABLE IF NOT EXISTS llm_requests (
          id SERIAL PRIMARY KEY,
          user_id VARCHAR(255),
          prompt TEXT NOT NULL,
          response TEXT,
          model VARCHAR(100),
          tokens INTEGER,
          execution_time INTEGER,
          created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
          metadata JSONB
        );
        
        CREATE INDEX IF NOT EXISTS idx_llm_requests_user_id ON llm_requests(user_id);
        CREATE INDEX IF NOT EXISTS idx_llm_requests_created_at ON llm_requests(created_at);
        CREATE INDEX IF NOT EXISTS idx_llm_requests_model ON llm_requests(model);
      `);

      await client.query(`
        CREATE TABLE IF NOT EXISTS llm_cache (
          id SERIAL PRIMARY KEY,
          cache_key VARCHAR(255) UNIQUE NOT NULL,
          prompt_hash VARCHAR(255) NOT NULL,
          response TEXT NOT NULL,
          model VARCHAR(100),
          created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
          expires_at TIMESTAMP,
          hit_count INTEGER DEFAULT 0,
          metadata JSONB
        );
        
        CREATE INDEX IF NOT EXISTS idx_llm_cache_key ON llm_cache(cache_key);
        CREATE INDEX IF NOT EXISTS idx_llm_cache_hash ON llm_cache(prompt_hash);
        CREATE INDEX IF NOT EXISTS idx_llm_cache_expires ON llm_cache(expires_at);
      `);

      console.log('PostgreSQL schema initialized');
    } finally {
      client.release();
    }
  }

  async logRequest(requestData) {
    const client = await this.pool.connect();
    
    try {
      const query = `
        INSERT INTO llm_requests 
        (user_id, prompt, response, model, tokens, execution_time, metadata)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        RETURNING id
      `;
      
      const values = [
        requestData.userId,
        requestData.prompt,
        requestData.response,
        requestData.model,
        requestData.tokens,
        requestData.executionTime,
        JSON.stringify(requestData.metadata || {})
      ];
      
      const result = await client.query(query, values);
      return result.rows[0].id;
    } finally {
      client.release();
    }
  }

  async getCachedResponse(promptHash) {
    const client = await this.pool.connect();
    
    try {
      const query = `
        SELECT response, model, metadata 
        FROM llm_cache 
        WHERE prompt_hash = $1 
        AND (expires_at IS NULL OR expires_at > CURRENT_TIMESTAMP)
      `;
      
      const result = await client.query(query, [promptHash]);
      
      if (result.rows.length > 0) {
        // Update hit count
        await client.query(
          'UPDATE llm_cache SET hit_count = hit_count + 1 WHERE prompt_hash = $1',
          [promptHash]
        );
        
        return result.rows[0];
      }
      
      return null;
    } finally {
      client.release();
    }
  }

  async setCachedResponse(promptHash, cacheKey, responseData, ttlSeconds = 3600) {
    const client = await this.pool.connect();
    
    try {
      const expiresAt = ttlSeconds 
        ? new Date(Date.now() + ttlSeconds * 1000) 
        : null;
      
      const query = `
        INSERT INTO llm_cache 
        (cache_key, prompt_hash, response, model, expires_at, metadata)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (cache_key) DO UPDATE SET
        response = EXCLUDED.response,
        model = EXCLUDED.model,
        expires_at = EXCLUDED.expires_at,
        metadata = EXCLUDED.metadata,
        created_at = CURRENT_TIMESTAMP
      `;
      
      const values = [
        cacheKey,
        promptHash,
        responseData.response,
        responseData.model,
        expiresAt,
        JSON.stringify(responseData.metadata || {})
      ];
      
      await client.query(query, values);
    } finally {
      client.release();
    }
  }

  async getUserUsage(userId, timeframe = '24h') {
    const client = await this.pool.connect();
    
    try {
      const interval = this.parseTimeframe(timeframe);
      
      const query = `
        SELECT 
          COUNT(*) as request_count,
          SUM(tokens) as total_tokens,
          AVG(execution_time) as avg_execution_time,
          array_agg(DISTINCT model) as models_used
        FROM llm_requests 
        WHERE user_id = $1 
        AND created_at > CURRENT_TIMESTAMP - INTERVAL '${interval}'
      `;
      
      const result = await client.query(query, [userId]);
      return result.rows[0];
    } finally {
      client.release();
    }
  }

  async getSystemMetrics(timeframe = '1h') {
    const client = await this.pool.connect();
    
    try {
      const interval = this.parseTimeframe(timeframe);
      
      const query = `
        SELECT 
          COUNT(*) as total_requests,
          COUNT(DISTINCT user_id) as unique_users,
          SUM(tokens) as total_tokens,
          AVG(execution_time) as avg_execution_time,
          model,
          COUNT(*) as model_requests
        FROM llm_requests 
        WHERE created_at > CURRENT_TIMESTAMP - INTERVAL '${interval}'
        GROUP BY model
        ORDER BY model_requests DESC
      `;
      
      const result = await client.query(query);
      return result.rows;
    } finally {
      client.release();
    }
  }

  parseTimeframe(timeframe) {
    const match = timeframe.match(/^(\d+)([hdw])$/);
    if (!match) return '1 hour';
    
    const [, amount, unit] = match;
    const unitMap = { h: 'hour', d: 'day', w: 'week' };
    
    return `${amount} ${unitMap[unit]}${amount > 1 ? 's' : ''}`;
  }

  async cleanup() {
    await this.pool.end();
  }
}

export default PostgreSQLIntegration;
